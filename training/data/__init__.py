"""From files to a batch: records in the layout of FastComposer's FFHQ, made, read, and made ready to train on."""
