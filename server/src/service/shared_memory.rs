//! Regions of shared memory that clients register.

use std::collections::HashMap;

use sensorium_proto::inference::{
    SystemSharedMemoryRegisterRequest, SystemSharedMemoryStatusRequest, SystemSharedMemoryStatusResponse,
    SystemSharedMemoryUnregisterRequest, system_shared_memory_status_response::RegionStatus,
};
use tonic::{Code, Status};

use super::Service;
use crate::shared_memory::{Registration, SharedMemoryError};

impl Service {
    pub(crate) fn register_memory(&self, request: SystemSharedMemoryRegisterRequest) -> Result<(), Status> {
        let SystemSharedMemoryRegisterRequest { name, key, offset, byte_size } = request;
        self.memory.register(Registration { name, key, offset, byte_size }).map_err(|error| status(&error))
    }

    pub(crate) fn unregister_memory(&self, request: &SystemSharedMemoryUnregisterRequest) {
        self.memory.unregister(named(&request.name));
    }

    pub(crate) fn memory_status(
        &self,
        request: &SystemSharedMemoryStatusRequest,
    ) -> Result<SystemSharedMemoryStatusResponse, Status> {
        let regions = self.memory.status(named(&request.name)).map_err(|error| status(&error))?;
        let region = |Registration { name, key, offset, byte_size }| {
            (name.clone(), RegionStatus { name, key, offset, byte_size })
        };
        let regions: HashMap<_, _> = regions.into_iter().map(region).collect();
        Ok(SystemSharedMemoryStatusResponse { regions })
    }
}

fn named(name: &str) -> Option<&str> {
    (!name.is_empty()).then_some(name)
}

fn status(error: &SharedMemoryError) -> Status {
    Status::new(code(error), error.to_string())
}

fn code(error: &SharedMemoryError) -> Code {
    match error {
        SharedMemoryError::Off => Code::Unimplemented,
        SharedMemoryError::Unknown { .. } => Code::NotFound,
        SharedMemoryError::Exists { .. } => Code::AlreadyExists,
        SharedMemoryError::Full | SharedMemoryError::Spent(_) => Code::ResourceExhausted,
        SharedMemoryError::TooLarge { .. }
        | SharedMemoryError::Name { .. }
        | SharedMemoryError::Key { .. }
        | SharedMemoryError::Access { .. }
        | SharedMemoryError::Outside { .. } => Code::InvalidArgument,
    }
}
