"""The HTTP server: an engine behind the interface that OpenAI's clients speak.

app.py puts the parts together; each of them is one file. page/ is what a browser is sent: plain files, no build.
"""
