"""The calculator agent as a LangGraph graph with memory: chat completions or responses."""

from __future__ import annotations

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from shared import SYSTEM_PROMPT, Options, calculator, main


async def agent(options: Options) -> list[str]:
    model = ChatOpenAI(
        model=options.model,
        use_responses_api=options.api == "responses",
        streaming=options.stream,
    ).bind_tools([calculator])

    async def speak(state: MessagesState) -> dict:
        return {
            "messages": [await model.ainvoke([SystemMessage(SYSTEM_PROMPT), *state["messages"]])]
        }

    graph = StateGraph(MessagesState)
    graph.add_node("speak", speak)
    graph.add_node("tools", ToolNode([calculator]))
    graph.add_edge(START, "speak")
    graph.add_conditional_edges("speak", tools_condition)
    graph.add_edge("tools", "speak")
    app = graph.compile(checkpointer=InMemorySaver())
    answers = []
    for question in options.questions:
        thread = {"configurable": {"thread_id": "1"}}
        state = await app.ainvoke({"messages": [HumanMessage(question)]}, thread)
        answers.append(state["messages"][-1].text)
    return answers


if __name__ == "__main__":
    main(agent, "chat", "responses")
