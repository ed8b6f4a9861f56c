"""Files that a sandbox finds in its /etc, and what it finds in place of a hidden package (absent.txt)."""
