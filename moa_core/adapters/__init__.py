"""What others have trained, as experts: each acts where its subject's word is, without a router of its own."""
