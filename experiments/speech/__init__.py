"""Voices: a small WaveNet adapts to new speakers, with and without a learned sigma."""
