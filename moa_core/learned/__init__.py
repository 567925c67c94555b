"""The paper's MoA: experts and routers that were trained beside the prior, and their file."""
