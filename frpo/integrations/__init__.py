"""FRPO inside other trainers, and the certificate beside any fine-tune. Each file imports its own trainer
alone."""
