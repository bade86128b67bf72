"""Checkpoints: reading, recognising, checking, converting and writing the files of models."""
