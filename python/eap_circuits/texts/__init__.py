"""From text, or messages, to tokens."""
