"""Short texts with what trips tokenizers: code, numbers, accents, wide and odd characters."""

TEXTS = [
    "def add(a, b):\n    return a + b  # 12345 and 6\n",
    "Ein Bär, zwei Bären; 東京タワー 🗼 and naïve café\n\n\nnew paragraph 2024-01-02\n",
    "\tindented\r\nlines\x00\x7f with \u200b odd characters\n",
]
