"""The Ray Serve application: gateway, retriever, weigher and generators behind one HTTP endpoint."""
