"""The paper's evaluation protocol: pictures drawn, faces and prompts compared, intervals."""
