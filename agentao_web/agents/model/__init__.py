"""The client to the model."""
