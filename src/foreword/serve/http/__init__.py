"""The HTTP server: an engine behind the interface that OpenAI's clients speak.

app.py puts the parts together; each of them is one file. A page to play with would be one more router there.
"""
