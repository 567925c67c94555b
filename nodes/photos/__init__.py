"""Reference photos: the face in them, the masks that come with them."""
