"""The world that the bundled model learns from: drawn scenes, exact questions about them, a tokenizer."""
