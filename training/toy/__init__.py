"""The toy world: procedural pictures of people in scenes, in which MoA trains on an ordinary machine."""
