"""Files written whole or not at all, refused with a sentence, known again by a fingerprint."""
