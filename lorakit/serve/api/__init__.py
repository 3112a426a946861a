"""HTTP in the forms of OpenAI's API: requests to work for an engine, pieces to answers."""
