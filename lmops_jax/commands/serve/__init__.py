"""`lmops serve`: a published model behind the protocol of OpenAI, for clients on this machine."""
