"""The toy worlds: pictures of coloured shapes and what can be said about them."""
