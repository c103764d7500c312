"""Window and sink softmax plus Hedgehog linear attention in one operator. The maths is in README.md."""
