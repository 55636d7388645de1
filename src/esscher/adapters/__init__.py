"""Other people's libraries, behind this library's records."""
