"""Raw messages -> tokenised rows -> a plan of packs -> batches."""
