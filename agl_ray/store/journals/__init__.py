"""Journals of the LightningStore: where its truth rests. `base` is the protocol, `opening` chooses one by URL."""
