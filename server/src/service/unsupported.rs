//! Calls of the protocol that this server does not have: each says so, and what to do instead.

/// Methods that answer UNIMPLEMENTED.
macro_rules! unsupported {
    ($($method:ident($request:ty) -> $response:ty, $instead:literal;)+) => {$(
        // `async_trait` does not see inside this macro, so this is what it would have written.
        fn $method<'life, 'call>(
            &'life self,
            _: Request<$request>,
        ) -> std::pin::Pin<Box<dyn Future<Output = Result<Response<$response>, Status>> + Send + 'call>>
        where
            'life: 'call,
            Self: 'call,
        {
            let message = concat!("this server does not have ", stringify!($method), ": ", $instead);
            Box::pin(std::future::ready(Err(Status::unimplemented(message))))
        }
    )+};
}

pub(super) use unsupported;
