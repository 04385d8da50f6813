"""What each merge saves: measured, predicted or counted."""
