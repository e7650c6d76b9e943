"""What every HTML page shares: its colours, its text and maps in the browser, and how parts become one file."""
