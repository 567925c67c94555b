"""Who there is: subjects, the words they are bound to, and the rows of a U-Net call that carry them."""
