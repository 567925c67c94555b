"""Who is where in a picture, as the steps so far show it."""
