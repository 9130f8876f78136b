"""What goes in as text: files and sets, tokens, the demo's wheels."""
