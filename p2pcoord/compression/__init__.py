"""Lossy compression of flat float32 vectors: `compressor(kind, **options)`, by itself and without a node."""

from p2pcoord.compression.registry import compressor

__all__ = ["compressor"]
