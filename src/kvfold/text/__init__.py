"""Text as tokens: packed token files, and pairs for encoder-decoders."""
