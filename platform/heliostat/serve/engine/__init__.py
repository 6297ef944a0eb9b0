"""The text engine: many streams of tokens from one decoder, without Ray and without HTTP."""
