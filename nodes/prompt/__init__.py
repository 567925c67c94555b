"""A prompt on its way through CLIP: which tokens carry which subject, and what each subject's expert reads."""
