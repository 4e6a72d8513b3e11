"""What stands before the text: virtual tokens, and prefixes in the attention."""
