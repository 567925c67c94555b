"""What a patched MODEL does while it samples: around a run, around each U-Net call, and what it keeps of them."""
