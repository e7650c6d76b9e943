"""What everything else stands on: errors, configuration, ranks, files, precision, progress."""
