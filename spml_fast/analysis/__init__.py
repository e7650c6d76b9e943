"""What people do with a trained run: predict, explain, suggest, diagnose, export, report."""
