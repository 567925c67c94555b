"""What can be shown of a finished picture: maps, likeness, files, and a report as text."""
