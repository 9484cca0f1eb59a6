"""What several tasks are made of: heads, vocabularies, codebooks, decoders, teachers, views, and the side of a pair."""
