"""What becomes of a trained adapter: saved, verified, merged, published; each with its proof."""
