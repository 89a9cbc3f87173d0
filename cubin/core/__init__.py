"""The core: arrays, rows, primitives and passes. It knows no code and no solver."""
