"""What a number format can hold, and the nearest of it to a value."""
