"""The page of a server, and the routes that it has beside OpenAI's."""
