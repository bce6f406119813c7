"""In (convert), mark (prune), out (compact): the only room that knows both methods and layers."""
