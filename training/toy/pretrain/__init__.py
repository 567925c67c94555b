"""The training of the toy world's models before there is a MoA: base model, image encoder, judges."""
