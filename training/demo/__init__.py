"""What MoA does, on one sheet, with the toy models that come with the pack."""
