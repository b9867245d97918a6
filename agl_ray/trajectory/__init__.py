"""Call spans to training rows: rewards and ids (batch), ragged arrays (ragged), the call tree (rows)."""
