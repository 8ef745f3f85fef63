"""Pure decoders: bytes in, chunks and rejects out; none of them raises."""
