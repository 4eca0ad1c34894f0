"""Pictures as arrays: decoding, colour, framing, masks, depth and control maps."""
