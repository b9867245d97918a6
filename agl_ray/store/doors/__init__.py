"""Doors: ways into the store over HTTP. The call route for our own client, REST, OTLP, the facade of agent-lightning 1.0."""
