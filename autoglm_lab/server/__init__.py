"""The local engine as a service: OpenAI's endpoints, and our own for its memory."""
