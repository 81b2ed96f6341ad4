"""What client and server share on the way between them: message format, and Flower's processes."""
